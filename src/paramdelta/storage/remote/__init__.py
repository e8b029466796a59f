"""Files that lie elsewhere, read by byte range: over HTTP, on the Hugging Face Hub, in object stores.

Nothing of them is stored on this machine. What speaks to servers (fsspec, huggingface_hub) is imported when first
needed, and is not part of the core install.
"""

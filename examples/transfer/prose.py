"""What `docs/experiment.md` says around its numbers."""

OPENING = """# Experiment: ParamΔ in miniature

<!-- written by examples/transfer/report.py -->

Does a delta from one base model work on another? Here it is tried on real weights, small enough for two cores and an
evening: SmolLM2-135M-Instruct (Θ_base) learns skills that it does not have (Θ_post); its base is updated with the
sources of Python's standard library (Θ'_base); `paramdelta merge` puts the two together; and the updated base is
post-trained itself, with the same data, steps and order, which is what a merge is to replace (*direct*).
"""

CLOSING = """## Again

```console
$ make experiment         # hours; goes on where it was interrupted
$ make experiment-quick   # five minutes: does it work at all?
```
"""

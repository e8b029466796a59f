"""ParamΔ in miniature, on real weights: `python -m examples.transfer.experiment`."""

"""What `docs/experiment.md` says around its numbers."""

OPENING = """# Experiment: ParamΔ in miniature

<!-- written by examples/transfer/report.py -->

Does a delta from one base model work on another? Here it is tried on real weights, small enough for two cores and an
evening: SmolLM2-135M-Instruct (Θ_base) learns skills that it does not have (Θ_post); its base is updated with the
sources of Python's standard library (Θ'_base); `paramdelta merge` puts the two together; and the updated base is
post-trained itself, with the same data, steps and order, which is what a merge is to replace (*direct*).

All checkpoints are bf16, as labs publish them: a merge is given rounded weights, and rounds once. Training keeps f32
weights and computes in bf16. An answer is right if it is the expected one to the letter; what is asked was never
trained on, and differs from it in its words or numbers. Perplexity is that of files of the library that were held out.
"""

CLOSING = """## What it shows, and what it does not

It shows that the arithmetic does on real, trained weights what the paper says: skills that cost minutes of training
arrive on the updated base in a second, and the update is still there. It shows a limit too: after the larger update,
which moves the weights three times as far as post-training does, `reverse` came out at half of what direct training
gives it (first seed), while the other skills held, but for `days`, which direct training hardly learns and a merge
loses. Two deltas that were trained apart, each of which works alone, lost most of what they can when both were added:
one seed, one pair, and the reason has not been looked into. And a merge is not the training it replaces: the two
changes of weights are alike, not the same.

It does not show how well the method does on a model that anybody uses. This one has 135 million parameters, its skills
are small and narrow, its base is an instruct model already, and its update is short. The answers are those of one
learning rate for each kind of training: that of post-training after one trial, before the scores of any merge were
known, those of the updates hardly tried. The skill that is trained alone was another at first, `sort`, whose scores
turned out to be those of chance; and *update kept* was measured against Θ_base at first (ParamΔ 0.15 for the small
update), and against Θ_post since post-training itself was seen to cost what the update gains.
Perplexity rises with post-training on something else, here about as much as the small update gained: what to compare is
ParamΔ with direct training, not with Θ'_base. Where few seeds are in, small differences are noise. Why some answers are
decoded otherwise than they are scored has not been looked into; all models are scored alike. The domain's text
depends on the version of Python, and another processor rounds otherwise: decimals will differ, directions should not.

## Again

```console
$ make experiment         # an hour or two; goes on where it was interrupted
$ make experiment-quick   # five minutes, two skills: does it work at all?
```

[How it is made](../examples/transfer/README.md).
"""

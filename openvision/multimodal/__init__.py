"""LLaVA-style models around any vision encoder, as stock transformers classes: build, train, chat, evaluate.

| folder        | content                                                                                          |
|---------------|--------------------------------------------------------------------------------------------------|
| `model`       | vision tower, projector and language model in one folder; its visual tokens; its answers         |
| `data`        | conversations in LLaVA's format, from files or the Hub to batches; cached features of an encoder  |
| `recipe`      | stages, learning rates by module, execution settings                                             |
| `training`    | trained modules, losses, the Trainer, a run with its checkpoints                                  |
| `cost`        | FLOPs and hours of a recipe                                                                      |
| `benchmarks`  | official metrics on local copies of benchmarks, the runner, a plug-in for lmms-eval               |
| `experiments` | encoders side by side, a demonstration on a CPU                                                  |

Stands on everything but `inference` and `planning`.
"""

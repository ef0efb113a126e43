"""LLaVA-style models around any encoder: built, trained, talked to; stock transformers classes all the way.

| module           | what it knows                                                                     |
|------------------|-----------------------------------------------------------------------------------|
| `towers`         | an OpenVision checkpoint, a CLIP, SigLIP or ViT folder as a vision tower           |
| `llm`            | a causal language model and its tokenizer, checked for what training needs         |
| `geometry`       | how many tokens a picture becomes                                                 |
| `build`          | tower + projector + language model = a folder                                     |
| `conversation`   | a LLaVA sample, its ids and which of them are answers                              |
| `data`, `collate`| samples from disk to batches                                                      |
| `recipe`, `train`| stages, learning rates by module, checkpoints                                      |
| `cache`          | features of a frozen encoder, computed once                                       |
| `generate`, `chat` | answers                                                                         |
| `cost`           | operations and hours of a recipe                                                  |
| `toy`            | a language model for trying things out                                            |
| `benchmarks`, `compare`, `demo` | scores, encoders side by side, a demonstration                     |
"""

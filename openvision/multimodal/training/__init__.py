"""Training a LLaVA-style model in stages through `transformers.Trainer`."""

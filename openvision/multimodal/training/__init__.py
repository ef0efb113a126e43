"""Training a LLaVA model in stages, through `transformers.Trainer`."""

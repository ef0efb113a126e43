"""From gradients to new parameters: Adam as published, Muon as an option, the learning rate, clipping and averaging."""

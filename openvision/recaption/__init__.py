"""New captions for shards: prompts, captioners, faults of captions, and the job that writes captions tars."""

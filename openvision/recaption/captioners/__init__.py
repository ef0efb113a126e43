"""Who writes captions: endpoints, models of transformers, checkpoints of ours; and what a captioner is to the job."""

"""The training that pretraining and fine-tuning share: batches, augmentation, the loop and its checkpoints."""

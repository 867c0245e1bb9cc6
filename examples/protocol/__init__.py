"""The paper's experiments: pretraining, fine-tuning, cross-validation, figures. README.md says how to run them."""

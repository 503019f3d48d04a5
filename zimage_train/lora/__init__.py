"""LoRA files and modules: names, attachment to the model, export, the training adapter."""

"""The files of a saved memory: tensors that grow at their end, the folder that holds them, the model that read it."""

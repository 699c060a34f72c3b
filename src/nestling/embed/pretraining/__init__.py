"""SMAE: pre-training by masked autoencoding."""

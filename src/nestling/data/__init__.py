"""Readers of texts, pairs and sets to measure on, whose errors name file and line."""

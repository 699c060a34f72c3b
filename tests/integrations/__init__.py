"""Integrations with other people's libraries, against the libraries themselves; ``make test-integrations`` has all.

A test whose library is not installed is skipped.
"""

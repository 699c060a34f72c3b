"""Other people's libraries that nestling works with. Each file knows one wing and one library, and imports it late.

Nothing but the command line imports this package.
"""

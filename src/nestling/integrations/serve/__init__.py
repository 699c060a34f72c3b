"""`nestling kv serve`: an OpenAI-compatible server of one model, every request with a nested cache of its own.

It is a small application on Starlette and uvicorn and not transformers' own ``transformers serve``. That one has no
public place where a model of ours, its cache, or a limit could be put in: its manager of models would have to be
patched. It also loads whatever model a request names, has a queue without an end, and answers errors in a shape that
OpenAI's clients do not read. What is left of it without these is less than what is in this folder.

One worker generates for one request at a time, so that one cache is held at a time, however many clients there are.
The others wait in a line of bounded length.

Files: `request` reads and checks what a client sends, `engine` has the line and the worker, `pieces` makes text of
tokens as they come, `replies` has OpenAI's shapes, `metrics` counts, `app` has the routes, `server` runs them.
"""

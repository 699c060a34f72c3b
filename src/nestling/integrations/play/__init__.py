"""`nestling play`: a page on which a small cache and a small encoder are tried beside the full ones, in Gradio.

The page is a front of both wings, as the command line is. `reader` (caches) and `finder` (encoders) do the work, know
one wing each and nothing of Gradio; `cache_tab` and `search_tab` show it; `sessions` keeps what belongs to a visitor;
`parts` are pieces of HTML; `page` puts the tabs together; `server` runs it and lets nothing be fetched from elsewhere.
"""

"""The server of `titans-export serve`: streams that keep what they learned, over HTTP. docs/serving.md describes it.

One file per job: `config`, `keys`, `errors`, `app` with its routes, `streams` (named streams), `batcher` (batches
across requests), `journal` over a `store`, `seal` (encryption), `metrics` and `logs`.
"""

"""The journal of a run, `OUT/.secateur/`: every finished block is on disk before the next begins, so a run can resume.

It holds a lock, a manifest, one file a block, and the finished model while that is saved. Files are written and flushed
first, and the manifest is replaced last: what the manifest does not name never happened.

`folder` locks and cleans it, `manifest` says how far the run is, `block_store` writes blocks and gives them back,
`publish` saves the finished model shard by shard and moves it to OUT.
"""

"""The journal of a run, `.OUT.secateur/` next to OUT: each finished block is on disk before the next begins.

It holds a lock, a manifest, one file a block, and the finished model while that is saved. Files are written and flushed
first, and the manifest is replaced last: what the manifest does not name never happened. OUT stays as it is until the
finished model takes its place in one step.

`folder` locks and cleans it, `manifest` says how far the run is, `block_store` writes blocks and gives them back,
`publish` saves the finished model shard by shard, `put_in_place` makes it OUT, `output_folder` says what may be
replaced there.
"""

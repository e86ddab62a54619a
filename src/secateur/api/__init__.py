"""The public functions behind the commands: they check arguments, and call what does the work.

`secateur/__init__.py` names them. `run.py` holds one run; nothing here computes.
"""

"""Files and folders that survive power cuts, damage and hostile content.

Durable writes that follow no link, digests of files, JSON that is checked, paths that users type, names of the files of a
checkpoint. Nothing here knows what is in the files.
"""

"""Files and folders that survive power cuts, damage and hostile content.

Durable writes that follow no link, digests of files, JSON that is checked, paths that users type, and the names of a
checkpoint's files. Nothing here knows what is in them.
"""

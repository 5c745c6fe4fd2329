"""Menu: files of other programs to nouns of ours. A dish is a file with a verb `read`.

Signature: `read(source) -> Imported` (or the noun itself where nothing has to be assumed), with `source` a path or
what was parsed from it.

Law, checked for each dish: what is wrong with a file is a CatalogueError of one line with file, field, found, allowed
and remedy, never a traceback; the same file gives an equal noun; nothing is downloaded; heavy packages are imported
inside the function.

Example:

    from moeplan.importers.hf_config import read

    imported = read("Mixtral-8x7B-v0.1/config.json")
    imported.model.total_parameters   # 46_702_792_704
    imported.assumptions              # () for a family that is known
"""

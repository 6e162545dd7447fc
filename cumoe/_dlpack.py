"""DLPack in and out, for the dtypes that NumPy's own importer refuses (bfloat16, float8)."""

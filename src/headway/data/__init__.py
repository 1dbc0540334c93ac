"""From documents to packed batches with document and position ids.

sources -> split -> near_duplicates -> tokenizers -> token_cache -> packing (order: permutation) -> loader
"""

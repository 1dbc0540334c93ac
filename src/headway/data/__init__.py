"""From documents to packed batches with document and position ids.

source_spec -> files, formats/ -> collect -> collection -> split -> near_duplicates -> tokenizers, encoding -> token_cache
-> packing or whole_documents (order: permutation) -> mixture -> loader, prefetch
"""

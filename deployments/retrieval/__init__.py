"""The document store and what is done with it: parsing, chunking, indexing, search. No Ray, no vLLM, no torch."""

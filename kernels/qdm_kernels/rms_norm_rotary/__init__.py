"""RMSNorm of the heads of queries and keys and their rotary embedding, in one pass into the buffers that attention reads."""

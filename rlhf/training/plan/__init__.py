"""What a run will take before it runs: memory, time and money, on the machine at hand or on one that is only described.

cast.py lays the roles out without their weights. live.py sends a micro-batch through them on tensors that have shapes and no
storage, and counts what is alive; needs.py adds what follows from sizes (state, KV cache), for any engine. work.py counts FLOP,
machines.py says how many a card makes. making.py puts these together, advice.py looks for what fits, probe.py measures.
"""

"""Benchmarks of every op: `lowbit bench`. Not part of the installed package.

harness.py times one case; bench_<op>.py has the cases of one op, peers.py the public kernels they
are compared with, shapes.py the models; tune.py measures tiles and tables.py
writes them into the tables of kernels/triton. accuracy.py is about the methods: their perplexity
beside other packages', each run by its worker in quantizers/.
"""

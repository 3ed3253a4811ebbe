"""Runs llama.cpp's own server, as the package xllamacpp has it, with a model file; prints its address.

``python llama_cpp_server.py FILE CONTEXT`` runs until it is terminated.
"""

import signal
import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.model_alias = ["tiny"]
params.n_ctx = int(sys.argv[2])
params.n_parallel = 1
params.hostnames = ["127.0.0.1"]
params.port = 0
params.warmup = False
params.cpuparams.n_threads = 1
params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(f"Running on {server.listening_address}", flush=True)
signal.pause()

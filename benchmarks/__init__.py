"""How fast Groundswell is beside what it is made of, over HTTP only.

`python -m benchmarks` compares Groundswell with what it would replace: same engines, same client.
`python -m benchmarks.data_path` measures the data path alone, on stubs of engines.
`python -m benchmarks.in_process` does so in one process, by CPU time.
`python -m benchmarks.chaos` breaks what can break, under load, and looks at what clients got.
`python -m benchmarks.memory` shows what ten thousand requests leave behind in the Router.
`python -m benchmarks.overload` sends more than the engine can do, and looks at what becomes of those who are let in.
"""

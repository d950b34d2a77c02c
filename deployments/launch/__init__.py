"""`make serve`: one machine, one command, nothing left behind.

`preflight` says in one sentence why a start cannot work; `environment` is what Ray and Serve read at their start;
`processes` knows which processes are ours; `supervisor` owns them and is what Ctrl-C reaches; `driver` starts Ray,
deploys and reports, in a process of its own, so that nothing Ray does can keep the supervisor from cleaning up.
"""

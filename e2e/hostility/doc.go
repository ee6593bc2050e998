// Package hostility attacks the built agent and checks that it lives within 128 MiB and that other clients are served. It
// holds tests only: TestHostility is the short form, in which each attack is at work while some requests of another
// client pass; BenchmarkHostility (`make hostility`) attacks for longer, and prints memory and latencies.
//
// The agent stands behind the rules of `pillion init`, as uid 1337. Where a memory cgroup can be made, it runs in one of
// 128 MiB, so that the kernel kills an agent that needs more, memory of the kernel included. Its largest resident memory
// is checked everywhere. The attackers are a process of their own in the peer's namespace. The other
// client has another address: a peer's memory is only taken for the good of others, see internal/budget.
package hostility

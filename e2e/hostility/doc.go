// Package hostility attacks the built agent and checks that it lives within 128 MiB and that other clients are served. It
// holds tests only: TestHostility is the short form, in which each attack is at work while some requests of another
// client pass; BenchmarkHostility (`make hostility`) attacks for longer, and prints memory and latencies.
//
// The agent stands behind the rules of `pillion init`, as uid 1337. Where a memory cgroup can be made, it runs in one of
// 128 MiB, so that the kernel kills an agent that needs more, memory of the kernel included. Its largest resident memory
// is checked everywhere. The attackers are a process of their own in the peer's namespace. The other client has an address
// of its own, because the budget takes memory from the peer that holds the most: see internal/budget.
//
// The benchmark needs an otherwise idle machine: a process that has the agent's core for some milliseconds makes latencies many times
// as long. It measures each attack several times, repeats measurements during which other processes had that core, and judges the
// median. Its last column shows what disturbance was left. The agent has a core for itself. The attackers, the other client and
// the servers share another one, on which the attackers have the lowest priority. So the attack delays the client there as
// well, and the client measures that: it also sends requests past the agent, to a second server that is not attacked, or to
// the origin itself if the attack consists of valid requests, which are work for the origin with and without the agent. The
// benchmark fails if the 99th percentile of the client's latencies through the agent is more than twice that before the
// attack, after the delay on the way past the agent has been added to the latter.
package hostility

// Package bench measures the built agent beside HAProxy and beside what Go's standard library makes easy, the plainest
// relay and httputil.ReverseProxy, in namespaces wired like a pod and its peer. It holds tests only: BenchmarkFigures
// prints the table, and a plain `go test` checks in some seconds that the harness still measures.
//
// What makes the figures comparable:
//
//   - Every proxy stands in the same place: behind the rules of `pillion init`, as uid 1337, accepting redirected
//     connections on 15006 and dialling the workload from 127.0.0.6.
//   - The proxy has one core and one worker thread; the load and the workload share another core. Only the proxy's own
//     CPU time is read, from its process clock, so a machine that is busy with something else disturbs little.
//   - For a request of HTTP, HAProxy and ReverseProxy do what is asked of pillion: a log line with what there is to
//     know, x-forwarded-for, x-request-id, and a connection to the workload that serves the next request as well. The
//     relay, which does none of this, is the floor. The load and the origin send bytes made beforehand and are the same
//     for all.
//   - The proxies take turns, round by round, each time with a new process in new namespaces. A ratio is the median of
//     the rounds' ratios, not the ratio of two medians: what slows one round slows both sides of it.
package bench

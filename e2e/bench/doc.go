// Package bench compares the built agent with HAProxy and with two proxies made from Go's standard library, a plain relay
// and httputil.ReverseProxy, in namespaces wired like a pod and its peer. It holds tests only: BenchmarkFigures prints the
// table, and a plain `go test` checks in a few seconds that the harness still works.
//
// The figures are comparable for these reasons:
//
//   - Every proxy has the same place: behind the rules of `pillion init`, as uid 1337, accepting redirected connections on
//     15006 and dialling the workload from 127.0.0.6.
//   - The proxy has one core and one worker thread; the load and the workload share another core. Only the proxy's own CPU
//     time is read, from its process clock, so other work on the machine has little effect.
//   - For an HTTP request, HAProxy and ReverseProxy have the same duties as pillion: a full log line, x-forwarded-for,
//     x-request-id, and a connection to the workload that also serves the next request. The relay has no such duties and
//     shows the minimum. The load and the origin send precomputed bytes, the same for all proxies.
//   - The proxies take turns, round by round, each time with a new process in new namespaces. A ratio is the median of the
//     rounds' ratios, not the ratio of two medians, because a disturbance slows all proxies of a round.
//
// The rows of `pillion run` are durations on all cores instead, as its user sees them.
package bench

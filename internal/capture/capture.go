// Package capture is the contract between the rules and the agent: the captured traffic, the ports it goes to, and the
// users whose traffic is not captured.
package capture

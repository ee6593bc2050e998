// Package capture is the contract between the rules and the agent: which traffic is captured, which ports it goes to,
// and which user is left alone.
package capture

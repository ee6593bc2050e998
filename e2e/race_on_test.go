//go:build race

package e2e

// raceDetector is whether the tests, and so the binary they build, run under the race detector.
const raceDetector = true

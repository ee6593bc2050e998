package relay

import "time"

// paceStep is how much time a burst stands for. As much as the rate allows in it moves at once.
const paceStep = 50 * time.Millisecond

// Pace limits the bytes of one direction to a rate. It is a bucket of tokens that holds those of one step, and one byte at
// least. A nil Pace does not limit.
type Pace struct {
	rate   float64 // bytes for each second
	tokens float64
	at     time.Time // of tokens; zero: not used yet
}

// NewPace returns the Pace for a rate in bytes for each second, nil for zero.
func NewPace(rate uint64) *Pace {
	if rate == 0 {
		return nil
	}
	return &Pace{rate: float64(rate)}
}

// Allowance returns how many bytes may move now.
func (p *Pace) Allowance(now time.Time) int {
	full := max(p.rate*paceStep.Seconds(), 1)
	if p.at.IsZero() {
		p.tokens = full
	} else {
		p.tokens = min(p.tokens+now.Sub(p.at).Seconds()*p.rate, full)
	}
	p.at = now
	return max(int(p.tokens), 0)
}

// Spend takes n bytes that have moved. If that is more than the allowance, the allowance stays zero for longer.
func (p *Pace) Spend(n int) { p.tokens -= float64(n) }

// Next returns when half of a step's bytes may move, and one byte at least. It is after the time of the last Allowance if
// that was zero.
func (p *Pace) Next() time.Time {
	wanted := max(p.rate*paceStep.Seconds()/2, 1)
	return p.at.Add(time.Duration((wanted-p.tokens)/p.rate*float64(time.Second)) + 1)
}

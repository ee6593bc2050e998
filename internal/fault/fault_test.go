package fault

import (
	"testing"
	"time"
)

func TestRulesAreParsedAndDrawn(t *testing.T) {
	var set Set
	for _, text := range []string{
		"host=api.example,delay=200ms,percent=25", "host=*.example,abort=503", "host=203.0.113.0/24,reset", "delay=1s,percent=50",
		"host=slow.test,delay=1s,rate=1.5KiB/s",
	} {
		r, err := Parse(text)
		if err != nil {
			t.Fatalf("Parse(%q): %v", text, err)
		}
		set = append(set, r)
	}
	for _, test := range []struct {
		host   string
		random float64
		want   Fault
	}{
		{"api.example", 0.249, Fault{Delay: 200 * time.Millisecond}},
		{"API.example:80", 0, Fault{Delay: 200 * time.Millisecond}},
		{"api.example", 0.25, Fault{Abort: 503}}, // the next rule
		{"203.0.113.7:443", 0.9, Fault{Reset: true}},
		{"[2001:db8::7]:443", 0.49, Fault{Delay: time.Second}},
		{"other.test", 0.5, Fault{}},
		{"", 0.1, Fault{Delay: time.Second}},
		{"slow.test", 0.5, Fault{Delay: time.Second, Rate: 1536}},
	} {
		if got := set.draw(test.host, "198.51.100.9:80", func() float64 { return test.random }); got != test.want {
			t.Errorf("draw(%q) at %v = %+v, want %+v", test.host, test.random, got, test.want)
		}
	}
	if got := set.draw("other.test", "203.0.113.7:80", func() float64 { return 0.9 }); got != (Fault{Reset: true}) {
		t.Errorf("by its address, a request gets %+v", got)
	}
	if !set.Limits() || set[:4].Limits() {
		t.Error("not the last rule alone limits a rate")
	}
	if Set(nil).Draw("api.example", "") != (Fault{}) {
		t.Error("no rules make a fault")
	}
}

func TestRatesHaveUnits(t *testing.T) {
	for text, want := range map[string]uint64{
		"1B/s": 1, "10KB/s": 10_000, "10kB/s": 10_000, "1MB/s": 1_000_000, "0.5GB/s": 500_000_000, "1KiB/s": 1 << 10, "2MiB/s": 2 << 20, "1GiB/s": 1 << 30,
	} {
		if r, err := Parse("rate=" + text); err != nil || r.fault != (Fault{Rate: want}) {
			t.Errorf("rate=%s: %+v, %v, want %d", text, r.fault, err, want)
		}
	}
}

// An error names the field and the value, and what is accepted.
func TestErrorsNameTheRemedy(t *testing.T) {
	_, err := Parse("host=api.example,rate=fast")
	if err == nil || err.Error() != `"rate=fast": not a rate such as 1MB/s or 64KiB/s, from 1B/s to 1TB/s` {
		t.Errorf("%v", err)
	}
}

func TestSenselessRulesAreErrors(t *testing.T) {
	for _, text := range []string{
		"", "host=api.example", "delay=0s", "delay=-1s", "delay=fast", "abort=99", "abort=600", "abort=x", "reset=yes", "reset,abort=503",
		"delay=1s,percent=0", "delay=1s,percent=101", "delay=1s,percent=NaN", "host=a..b,reset",
		"rate=1MB/s,reset", "rate=1MB/s,abort=503", "rate", "rate=fast", "rate=1MB", "rate=1", "rate=0.5B/s", "rate=0MB/s", "rate=-1B/s", "rate=NaNB/s", "rate=2000GB/s",
	} {
		if r, err := Parse(text); err == nil {
			t.Errorf("Parse(%q) = %+v", text, r)
		}
	}
}

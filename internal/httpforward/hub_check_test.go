package httpforward

import (
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// question is a Check that counts how often it is given up.
type question struct{ canceled atomic.Int32 }

func (*question) Notify(func())  {}
func (*question) Answered() bool { return false }
func (q *question) Cancel()      { q.canceled.Add(1) }

// A hub refuses a request that has to be asked about, as ext_authz does when it fails closed.
func TestAHubRefusesWhatItCannotAskAbout(t *testing.T) {
	asked := new(question)
	o := newOrigin(t)
	r := newHub(t, o.address, &planned{decide: func(_ *Request, d *Decision) { d.Target, d.Check = upstream.Target{}, asked }})
	response, err := http2Client(t).Get("http://" + r.address + "/")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	got := r.records.await(t, 0)
	if response.StatusCode != 403 || got.reason != flow.PolicyDenied || got.flags != "UAEX" || got.details != "ext_authz_error" {
		t.Errorf("%s, and the record is %+v", response.Status, got)
	}
	if n := asked.canceled.Load(); n != 1 {
		t.Errorf("the question was given up %d times, want 1", n)
	}
}

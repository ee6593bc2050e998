package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// refusing is a receiver that cannot be reached.
type refusing struct{}

func (refusing) RoundTrip(*http.Request) (*http.Response, error) { return nil, os.ErrPermission }

func newExporters(t *testing.T) *Exporters {
	e := &Exporters{
		Counts: new(export.Counts), Log: slog.New(slog.DiscardHandler),
		Transport: func(string, bool) http.RoundTripper { return refusing{} },
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		for _, made := range e.All() {
			made.Close(ctx)
		}
	})
	return e
}

func tracingTo(cluster string) *mesh.Tracing {
	return &mesh.Tracing{Receiver: mesh.Receiver{GRPC: &mesh.GRPCService{Cluster: cluster}}}
}

func configured(all ...*mesh.Tracing) func(func(*mesh.Tracing) bool) { return slices.Values(all) }

// Only the receivers of one configuration are limited, not those of the life of the process.
func TestReceiversThatAreNotConfiguredAnyMoreAreForgotten(t *testing.T) {
	e := newExporters(t)
	for i := range 3 * maxGone {
		name := fmt.Sprint(i)
		e.Keep(configured(tracingTo(name)))
		policy := e.Policy(tracingTo(name))
		if policy.Exporter == nil {
			t.Fatalf("receiver %d is refused", i)
		}
		if again := e.Policy(tracingTo(name)); again.Exporter != policy.Exporter {
			t.Fatalf("receiver %d has two exporters", i)
		}
	}
	if n := len(e.byName); n > maxGone+1 {
		t.Errorf("%d exporters are kept, want at most %d", n, maxGone+1)
	}
}

// At most 8 receivers are configured. One that is configured again keeps its exporter.
func TestTooManyReceiversAreRefused(t *testing.T) {
	e := newExporters(t)
	var all []*mesh.Tracing
	for i := range maxExporters + 1 {
		all = append(all, tracingTo(fmt.Sprint(i)))
	}
	e.Keep(configured(all...))
	for i, one := range all {
		if made := e.Policy(one).Exporter; (made != nil) != (i < maxExporters) {
			t.Errorf("receiver %d has the exporter %v", i, made)
		}
	}
	first := e.Policy(all[0]).Exporter
	e.Keep(configured(all[1:]...))
	if e.Policy(tracingTo("8")).Exporter == nil {
		t.Error("the place of a receiver that is not configured any more is not free")
	}
	e.Keep(configured(all...))
	if e.Policy(tracingTo("0")).Exporter != first {
		t.Error("a receiver that is configured again has another exporter")
	}
}

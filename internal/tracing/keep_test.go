package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
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
	e.Keep(configured(all[:maxExporters]...))
	if e.Policy(tracingTo("0")).Exporter != first {
		t.Error("a receiver that is configured again has another exporter")
	}
}

// A configuration has all places: those of the one before are free, although its requests still use them. A receiver that finds
// no place is logged once, and gets one as soon as it is free, for requests of the same configuration.
func TestARefusedReceiverGetsItsPlaceLater(t *testing.T) {
	e := newExporters(t)
	var log strings.Builder
	e.Log = slog.New(slog.NewTextHandler(&log, nil))
	var old, next []*mesh.Tracing
	for i := range maxExporters {
		old, next = append(old, tracingTo(fmt.Sprint("old", i))), append(next, tracingTo(fmt.Sprint("new", i)))
	}
	e.Keep(configured(old...))
	for i := range old {
		if e.Policy(old[i]).Exporter == nil || e.Policy(next[i]).Exporter == nil {
			t.Fatalf("receiver %d is refused while the configuration changes", i)
		}
	}
	e.Keep(configured(next...))
	late := tracingTo("late")
	for range 2 {
		e.Keep(configured(append([]*mesh.Tracing{late}, next...)...))
		if e.Policy(late).Exporter != nil {
			t.Error("a ninth receiver takes the place of another")
		}
	}
	for i := range next {
		if e.Policy(next[i]).Exporter == nil {
			t.Errorf("receiver %d has lost its place", i)
		}
	}
	if n := strings.Count(log.String(), "too many receivers of spans"); n != 1 || !strings.Contains(log.String(), "target=late") {
		t.Errorf("%d lines, want 1 that names the receiver:\n%s", n, log.String())
	}
	e.Keep(configured(late, next[0]))
	if e.Policy(late).Exporter == nil {
		t.Error("a refused receiver does not get the place that is free")
	}
}

// Receivers that no configuration names are bounded as well.
func TestReceiversOfOtherConfigurationsAreBounded(t *testing.T) {
	e := newExporters(t)
	e.Keep(configured())
	for i := range 2 * maxGone {
		e.Policy(tracingTo(fmt.Sprint(i)))
	}
	if n := len(e.byName); n != maxGone+maxExporters {
		t.Errorf("%d exporters, want %d", n, maxGone+maxExporters)
	}
	own := tracingTo("own")
	e.Keep(configured(own))
	if e.Policy(own).Exporter == nil {
		t.Error("a receiver that is configured has no place")
	}
}

package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const webCluster = "outbound|80||web.shop.svc.cluster.local"

// configured returns an agent whose control plane has configured two clusters.
func configured(t *testing.T) *running {
	r := newRunning(t)
	var list []controlplane.Resource
	for _, name := range []string{"PassthroughCluster", webCluster} {
		bytes := func() ([]byte, error) {
			return protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), name), nil
		}
		list = append(list, controlplane.Resource{Type: xds.Clusters, Name: name, Bytes: bytes,
			Findings: []mesh.Finding{{Class: mesh.Traffic, Path: "health_checks", Problem: "not supported"}}})
	}
	r.resources = func() controlplane.Resources { return slices.Values(list) }
	return r
}

func TestConfigShowsObjectsAndFindings(t *testing.T) {
	r := configured(t)
	for _, c := range []struct {
		args  string
		parts []string
	}{
		{"show cluster", []string{"CLUSTER", "\nPassthroughCluster", "\n" + webCluster}},
		{"show clusters", []string{"CLUSTER"}},
		{"show cluster web.shop.svc.cluster.local", []string{webCluster + "\n  state        active", "finding      traffic: health_checks: not supported"}},
		{"show route", []string{"no routes\n"}},
		{"findings", []string{"CLASS", "traffic  CDS   PassthroughCluster"}},
	} {
		out, complaints, err := r.look(t, append([]string{"config"}, strings.Fields(c.args)...)...)
		if err != nil || complaints != "" {
			t.Errorf("%s: %v %s", c.args, err, complaints)
		}
		for _, part := range c.parts {
			if !strings.Contains(out, part) {
				t.Errorf("%s: %q is not in\n%s", c.args, part, out)
			}
		}
	}
}

func TestConfigAsJSON(t *testing.T) {
	r := configured(t)
	out, _, err := r.look(t, "config", "show", "cluster", "PassthroughCluster", "-o", "json")
	var view configview.View
	if err != nil || json.Unmarshal([]byte(out), &view) != nil || len(view.Clusters) != 1 || view.Clusters[0].Name != "PassthroughCluster" {
		t.Errorf("%v: %s", err, out)
	}
	out, _, err = r.look(t, "config", "findings", "-o", "json")
	var list struct{ Findings []configview.Finding }
	if err != nil || json.Unmarshal([]byte(out), &list) != nil || len(list.Findings) != 2 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestABundleHasTheFindings(t *testing.T) {
	out, _, err := configured(t).look(t, "bundle", "-f", "-")
	if parts := unpack(t, strings.NewReader(out)); err != nil || !strings.Contains(parts["findings.json"], "health_checks") {
		t.Errorf("%v: %q", err, parts["findings.json"])
	}
}

func TestConfigErrors(t *testing.T) {
	r, alone := configured(t), newRunning(t)
	for _, c := range []struct {
		agent *running
		args  string
		want  string
	}{
		{r, "show", `0 arguments: use KIND [NAME]; the kinds are cluster, listener, route, endpoint, policy, name`},
		{r, "show secret", `"secret" is not a kind of object: use cluster,`},
		{r, "show cluster a b", `3 arguments: use KIND [NAME]`},
		{r, "show cluster nothing", `no cluster is named "nothing"`},
		{r, "findings x", `unexpected argument "x"`},
		{alone, "show cluster", "this agent has no control plane"},
		{alone, "findings", "this agent has no control plane"},
	} {
		out, _, err := c.agent.look(t, append([]string{"config"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(err.Error(), c.want) || out != "" {
			t.Errorf("%s: %v, want %s; printed %q", c.args, err, c.want, out)
		}
	}
}

func TestConfigCompletesKindsAndNames(t *testing.T) {
	r := configured(t)
	for args, want := range map[string]string{
		"config show":           "cluster\nlistener\nroute\nendpoint\npolicy\nname\n:4\n",
		"config show cluster":   "PassthroughCluster\n" + webCluster + "\n:4\n",
		"config show secret":    ":4\n",
		"config show cluster x": ":4\n",
	} {
		words := append([]string{"__complete"}, strings.Fields(args)...)
		out, _, err := lookAt(t.Context(), append(words, "--admin", r.address, "")...)
		if err != nil || out != want {
			t.Errorf("%s: %v, got %q, want %q", args, err, out, want)
		}
	}
}

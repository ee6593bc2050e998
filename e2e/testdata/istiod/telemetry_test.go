package istiod

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// telemetry returns a Telemetry resource with the fields of its spec in lines.
func telemetry(namespace, name string, spec ...string) string {
	return "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: " + name + ", namespace: " + namespace + "}\nspec:\n  " + strings.Join(spec, "\n  ") + "\n"
}

// ask sends a request to the other pod's web service, on a connection of its own, and waits until it is counted.
func (c *couple) ask(from int, path string, fields ...string) error {
	d := c.pods[from]
	before, err := d.metric("pillion_flows_total")
	if err != nil {
		return err
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return d.Dial("tcp", c.vip[1-from]+":8080", patience)
	}}
	host := [...]string{"web", "back"}[from] + ".default.svc.cluster.local:8080"
	request, err := http.NewRequest(http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return err
	}
	for i := 0; i < len(fields); i += 2 {
		request.Header.Set(fields[i], fields[i+1])
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s, %v", path, response.Status, err)
	}
	return until(func() error {
		now, err := d.metric("pillion_flows_total")
		if err == nil && now <= before {
			err = fmt.Errorf("%s is not counted: pillion_flows_total is still %v", path, now)
		}
		return err
	})
}

// awaitLine waits until the output of a pod's agent has a line with the text.
func (d *pod) awaitLine(t *testing.T, text string) {
	t.Helper()
	await(t, func() error {
		if !strings.Contains(d.log.String(), text) {
			return fmt.Errorf("the log of %s has no %q", d.workload.pod, text)
		}
		return nil
	})
}

// Telemetry resources of the mesh, a namespace and a workload decide what is logged, in which form and for which direction.
func TestAccessLogsAreAsTelemetryResourcesHaveThem(t *testing.T) {
	c := newCoupleWith(t, "STRICT")
	client, server := c.pods[0], c.pods[1]
	await(t, func() error { return c.ask(0, "/first") })
	for _, d := range c.pods { // accessLogFile of the mesh
		d.awaitLine(t, `"GET /first HTTP/1.1" 200`)
	}

	c.plane.apply(telemetry("istio-system", "mesh", "accessLogging:", "- providers: [{name: lines}, {name: json}]",
		`  filter: {expression: "response.code >= 400 || request.headers['x-debug'] == 'yes'"}`))
	await(t, func() error { // both agents follow
		if err := c.ask(0, "/second", "X-Debug", "yes", "X-Tenant", "blue"); err != nil {
			return err
		}
		for d, line := range map[*pod]string{client: "LINE OUTBOUND /second 200 blue", server: "LINE INBOUND /second 200 blue"} {
			if text := d.log.String(); !strings.Contains(text, line) || !strings.Contains(text, `{"status":200}`) {
				return fmt.Errorf("the log of %s has no %q", d.workload.pod, line)
			}
		}
		return nil
	})
	if err := c.ask(0, "/quiet"); err != nil {
		t.Fatal(err)
	}
	if err := c.ask(0, "/marker", "X-Debug", "yes"); err != nil {
		t.Fatal(err)
	}
	client.awaitLine(t, "LINE OUTBOUND /marker")
	if strings.Contains(client.log.String(), "/quiet") {
		t.Error("a request that the filter does not select is logged")
	}

	// The namespace logs everything again, and the workload only what it receives.
	c.plane.apply(telemetry("default", "namespace", "accessLogging:", "- providers: [{name: lines}]"))
	c.plane.apply(telemetry("default", "workload", "selector: {matchLabels: {app: nginx}}", "accessLogging:", "- match: {mode: CLIENT}", "  disabled: true"))
	attempt := 0
	await(t, func() error {
		attempt++
		gone, marker := fmt.Sprintf("/unsaid-%d", attempt), fmt.Sprintf("/said-%d", attempt)
		if err := c.ask(0, gone); err != nil {
			return err
		}
		if err := c.ask(1, marker); err != nil {
			return err
		}
		for end := 0; !strings.Contains(client.log.String(), "LINE INBOUND "+marker); end++ {
			if _, err := client.metric("pillion_flows_total"); err != nil || end == 2000 {
				return fmt.Errorf("no line of %s, %v", marker, err)
			}
		}
		if strings.Contains(client.log.String(), gone+" ") {
			return fmt.Errorf("%s is logged", gone)
		}
		return nil
	})

	// Nothing at all.
	c.plane.apply(telemetry("default", "workload", "selector: {matchLabels: {app: nginx}}", "accessLogging:", "- disabled: true"))
	client.awaitConverged(t, c.plane)
	for from := range 2 {
		if err := c.ask(from, "/disabled"); err != nil {
			t.Fatal(err)
		}
	}
	c.plane.remove(telemetry("default", "workload", "selector: {matchLabels: {app: nginx}}", "accessLogging:", "- disabled: true"))
	await(t, func() error {
		if err := c.ask(0, "/enabled"); err != nil {
			return err
		}
		if !strings.Contains(client.log.String(), "LINE OUTBOUND /enabled") {
			return fmt.Errorf("the log of %s has no line", client.workload.pod)
		}
		return nil
	})
	if strings.Contains(client.log.String(), "/disabled") {
		t.Error("a disabled access log has a line")
	}
}

// Telemetry resources change Istio's metrics: a label is added and another removed, a metric is disabled for one side.
func TestMetricsAreAsTelemetryResourcesHaveThem(t *testing.T) {
	c := newCoupleWith(t, "STRICT", "PILLION_ACCESS_LOG=off")
	client, server := c.pods[0], c.pods[1]
	await(t, func() error { return c.ask(0, "/first") })
	c.plane.apply(telemetry("istio-system", "mesh", "metrics:", "- providers: [{name: prometheus}]", "  overrides:",
		"  - match: {metric: REQUEST_COUNT}",
		`    tagOverrides: {tenant: {value: "request.headers['x-tenant']"}, destination_port: {value: string(destination.port)}, response_flags: {operation: REMOVE}}`,
		"  - match: {metric: RESPONSE_SIZE, mode: CLIENT}", "    disabled: true"))
	samples := func(d *pod, metric string) string {
		text, err := d.get(15090, "stats/prometheus")
		if err != nil {
			t.Fatal(err)
		}
		return linesOf(text, metric)
	}
	await(t, func() error { // both agents follow
		if err := c.ask(0, "/second", "X-Tenant", "blue"); err != nil {
			return err
		}
		for _, d := range c.pods {
			if text := samples(d, "istio_requests_total"); !hasSample(text, "istio_requests_total", []string{`tenant="blue"`, `destination_port="8080"`}) {
				return fmt.Errorf("%s counts\n%s", d.workload.pod, text)
			}
		}
		return nil
	})
	for line := range strings.Lines(samples(client, "istio_requests_total")) {
		if strings.Contains(line, "tenant=") && strings.Contains(line, "response_flags=") {
			t.Errorf("a label that is removed: %s", line)
		}
	}
	sizes := func(d *pod) string { return samples(d, "istio_response_bytes_count") }
	before := [2]string{sizes(client), sizes(server)}
	if err := c.ask(0, "/third"); err != nil {
		t.Fatal(err)
	}
	await(t, func() error {
		if sizes(server) == before[1] {
			return fmt.Errorf("the server does not count sizes: %s", before[1])
		}
		return nil
	})
	if now := sizes(client); now != before[0] {
		t.Errorf("the client counts sizes, though the metric is disabled: %s", now)
	}

	// The client's side has no metrics at all.
	c.plane.apply(telemetry("default", "workload", "selector: {matchLabels: {app: nginx}}", "metrics:", "- overrides: [{match: {mode: CLIENT}, disabled: true}]"))
	await(t, func() error {
		before := samples(client, "istio_requests_total")
		if err := c.ask(0, "/fourth"); err != nil {
			return err
		}
		if now := samples(client, "istio_requests_total"); now != before {
			return fmt.Errorf("the client counts\n%s", now)
		}
		return nil
	})
}

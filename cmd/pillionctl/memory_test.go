//go:build !race

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// deployment returns an object as `kubectl get -o yaml` prints it, of about 2.5 KB.
func deployment(i int) string {
	return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata:
  name: web-%[1]d
  labels: {app: web}
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      %[2]s
spec:
  replicas: 2
  selector:
    matchLabels:
      app: web-%[1]d
  template:
    metadata:
      labels:
        app: web-%[1]d
        version: v1
    spec:
      containers:
      - name: web
        image: registry.example/shop/web:1.2.3
        imagePullPolicy: IfNotPresent
        ports:
        - containerPort: 8080
          name: http
        env:
%[3]s
        readinessProbe:
          httpGet:
            path: /ready
            port: 8080
        resources:
          limits:
            memory: 256Mi
          requests:
            cpu: 100m
            memory: 128Mi
      terminationGracePeriodSeconds: 30
`, i, strings.Repeat("some text ", 60), strings.TrimSuffix(strings.Repeat("        - name: SETTING\n          value: a value of some length\n", 20), "\n"))
}

// A List of the Deployments of a large cluster takes at most ten times its size, in block style and as one line of JSON.
func TestAListTakesTenTimesItsSizeAtMost(t *testing.T) {
	const count = 2_500
	var block, flow strings.Builder
	block.WriteString("apiVersion: v1\nkind: List\nitems:\n")
	flow.WriteString(`{"apiVersion":"v1","items":[`)
	for i := range count {
		first := "- "
		for line := range strings.Lines(deployment(i)) {
			block.WriteString(first + line)
			first = "  "
		}
		if i > 0 {
			flow.WriteByte(',')
		}
		fmt.Fprintf(&flow, `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"web-%[1]d","annotations":{"a":%[2]q}},"spec":{"template":`+
			`{"metadata":{"labels":{"app":"web-%[1]d"}},"spec":{"containers":[{"name":"web","image":"registry.example/shop/web:1.2.3",`+
			`"env":[%[3]s],"ports":[{"containerPort":8080}]}]}}}}`, i, strings.Repeat("some text ", 60),
			strings.TrimSuffix(strings.Repeat(`{"name":"SETTING","value":"a value of some length"},`, 30), ","))
	}
	flow.WriteString(`],"kind":"List"}`)
	for style, text := range map[string]string{"block": block.String(), "flow": flow.String()} {
		name := file(t, style, text)
		status := filepath.Join(t.TempDir(), "status")
		cmd := exec.Command(os.Args[0], "inject", "-f", name, "-o", filepath.Join(t.TempDir(), "out"))
		cmd.Env = append(os.Environ(), asPillionctl+"="+status)
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Count(string(out), ": injected\n") != count {
			t.Fatalf("%s: %v: %.1000s", style, err, out)
		}
		used := peak(t, status)
		t.Logf("%s: %d bytes take %d, %.1f times as much", style, len(text), used, float64(used)/float64(len(text)))
		if used > 10*len(text) {
			t.Errorf("%s: %d bytes take %d", style, len(text), used)
		}
	}
}

// peak returns the most memory that a process has had at once, in bytes. (Its rusage would include this process'
// memory, from before it was executed.)
func peak(t *testing.T, status string) int {
	t.Helper()
	text, err := os.ReadFile(status)
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "VmHWM:")
	var kilobytes int
	if _, err := fmt.Sscanf(line, "%d kB", &kilobytes); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return kilobytes << 10
}

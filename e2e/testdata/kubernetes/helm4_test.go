package kubernetes

import (
	"bytes"
	"log"
	"log/slog"
	"reflect"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// Helm 4 makes the same objects as Helm 3 and logs nothing about the chart.
func TestHelm4AcceptsTheChartWithoutWarnings(t *testing.T) {
	var output bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&output, nil)))
	log.SetOutput(&output)
	t.Cleanup(func() { slog.SetDefault(before) })

	v := values{"podMonitor": values{"enabled": true}, "prometheusRule": values{"enabled": true}, "dashboard": values{"enabled": true}, "networkPolicy": values{"enabled": true}}
	c, err := loader.Load(chart)
	if err != nil {
		t.Fatal(err)
	}
	capabilities := common.DefaultCapabilities.Copy()
	capabilities.KubeVersion.Version = "v1.34.0"
	all, err := util.ToRenderValues(c, v, common.ReleaseOptions{Name: "pillion", Namespace: "pillion-system", IsInstall: true}, capabilities)
	if err != nil {
		t.Fatal(err)
	}
	got, err := engine.Render(c, all)
	if err != nil {
		t.Fatal(err)
	}
	want, err := render(v, "v1.34.0")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Helm 4 makes\n%v\nHelm 3\n%v", got, want)
	}
	for _, message := range lint.RunAll(chart, v, "pillion-system", lint.WithKubeVersion(&capabilities.KubeVersion)).Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
	if output.Len() > 0 {
		t.Errorf("Helm 4 logs\n%s", &output)
	}
}

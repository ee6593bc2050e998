{{/* Metadata of an object: its name, namespace, labels and annotations. values.schema.json forbids labels with the keys used here. */}}
{{- define "pillion.metadata" -}}
metadata:
  name: {{ .name }}
  {{- if .namespaced }}
  namespace: {{ .root.Release.Namespace }}
  {{- end }}
  labels:
    app.kubernetes.io/managed-by: {{ .root.Release.Service }}
    helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
    {{- with merge dict (.labels | default dict) .root.Values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge dict (.annotations | default dict) .root.Values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Who issues the webhook's certificate: self, cert-manager, or the Secret of somebody else. */}}
{{- define "pillion.issuer" -}}
{{- if .Values.tls.certManager -}}
cert-manager
{{- else if or .Values.tls.secret .Values.tls.authority -}}
secret
{{- else -}}
self
{{- end -}}
{{- end }}

{{/* Flags of the webhook for the defaults of sidecars. Kubernetes reads $$ as $. */}}
{{- define "pillion.sidecarFlags" -}}
{{- $resources := .resources | default dict -}}
{{- range $flag, $value := dict
  "cpu" (dig "requests" "cpu" "" $resources) "memory" (dig "requests" "memory" "" $resources)
  "cpu-limit" (dig "limits" "cpu" "" $resources) "memory-limit" (dig "limits" "memory" "" $resources)
  "log-level" .logLevel
  "access-log" .accessLog.path "access-log-format" .accessLog.format
  "access-log-encoding" .accessLog.encoding "access-log-filter" .accessLog.filter
  "interception-mode" .interceptionMode
  "exclude-inbound-ports" .excludeInboundPorts "exclude-outbound-ports" .excludeOutboundPorts
  "include-outbound-ip-ranges" .includeOutboundIPRanges "exclude-outbound-ip-ranges" .excludeOutboundIPRanges
  "opaque-ports" .opaquePorts "drain-delay" .drainDelay
  "dns-capture" (ternary "true" "" .dnsCapture) }}
{{- if $value }}
- {{ printf "--sidecar-%s=%s" $flag (toString $value) | replace "$" "$$" | quote }}
{{- end }}
{{- end }}
{{- end }}

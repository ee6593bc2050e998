{{/* The gateway's name. */}}
{{- define "gateway.name" -}}
{{ .Values.name | default .Release.Name }}
{{- end }}

{{/* The labels that pods have, and that select them. */}}
{{- define "gateway.selector" -}}
app: {{ include "gateway.name" . }}
istio: {{ include "gateway.name" . | trimPrefix "istio-" }}
{{- end }}

{{/* Metadata of an object. values.schema.json forbids labels with the keys used here. */}}
{{- define "gateway.metadata" -}}
metadata:
  name: {{ include "gateway.name" .root }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    app.kubernetes.io/managed-by: {{ .root.Release.Service }}
    helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
    {{- if .selected }}
    {{- include "gateway.selector" .root | nindent 4 }}
    {{- end }}
    {{- with .root.Values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge dict (.annotations | default dict) .root.Values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Whether more than one replica runs. */}}
{{- define "gateway.replicated" -}}
{{- if gt (int (ternary .Values.autoscaling.minReplicas .Values.replicas .Values.autoscaling.enabled)) 1 -}}
true
{{- end -}}
{{- end }}
